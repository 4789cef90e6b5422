"""The operators ``mst::linear``, ``mst::grouped_linear``, ``mst::packed_linear`` and ``mst::attention``: schema,
reference, fake, autograd. No kernel, no lowering."""
