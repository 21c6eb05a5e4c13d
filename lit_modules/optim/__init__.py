"""AdamW, its parameter groups and schedules, clipping, and steps that are skipped."""
