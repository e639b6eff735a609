"""The oracle of each op: plain torch, any float dtype up to float64, backward by autograd; imports no kernel."""
