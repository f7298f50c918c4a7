"""Steps on weights in half precision, with loss scaling, and optimizers whose state has few bits."""
