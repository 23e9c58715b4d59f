"""What passes that learn share: a block as a function of what is trained, the loss, and the loop."""
