"""Graph passes, in the order they run: capture, analyse, rebase, hoist, attention, rewrite."""
