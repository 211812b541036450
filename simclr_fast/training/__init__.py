"""What the trainer's loop is made of: the step, how a batch is cut, what a run will take, and what may befall it."""
