"""The graph of stages, its runner and the command line. No tensor lives here."""
