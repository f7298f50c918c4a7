"""What makes a run fit: ways to need less memory, what each costs, and the plan that takes one of them."""
