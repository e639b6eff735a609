"""Drawing: engines that turn a prefix into the next token's logits, filters, and the loops over them."""
