"""Messages on their way: a few at a time, lost clients asked again, one copy of the model for all."""
