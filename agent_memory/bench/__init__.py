"""The command `bench`: what a model switch, a restart and many at once cost, beside others."""
