"""Where every weight lives: a table per architecture, checkpoint files, Hugging Face export."""
