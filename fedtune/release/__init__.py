"""What leaves a study: its adapter in several forms, with a card, a signed manifest, and the checks of both."""
