"""Open X-Embodiment: which datasets upstream registers, how each is read, and the mixtures made of them."""
