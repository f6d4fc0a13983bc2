"""Documentation and the script that fills its generated blocks."""
