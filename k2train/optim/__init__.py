"""The sharded AdamW, global norm and learning-rate schedules."""
