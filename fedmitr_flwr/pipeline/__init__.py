"""Run the stages in order, report their progress, and save what they have finished."""
