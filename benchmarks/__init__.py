"""How fast mnist_lit is, side by side with the tutorial's loop, stock Lightning and the leanest loop."""
