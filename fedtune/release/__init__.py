"""What leaves a study: the PEFT folder and its card."""
