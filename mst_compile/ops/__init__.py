"""The operators ``mst::linear`` and ``mst::attention``: schema, reference, fake, autograd. No kernel, no lowering."""
