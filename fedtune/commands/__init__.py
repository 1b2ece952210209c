"""The subcommands of `fedtune`, found by entry point."""
