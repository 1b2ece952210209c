"""The shipped configuration: YAML only; installed as `fedtune.conf` and read by `fedtune.config.compose`."""
