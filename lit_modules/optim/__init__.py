"""AdamW, Muon, their parameter groups and schedules, clipping, and steps that are skipped."""
