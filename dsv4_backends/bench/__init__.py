"""Time the providers on the shapes of a real deployment: the ``bench`` command and what is made from its results.

``shapes`` says which rows are measured, ``inputs`` draws them on the device, ``timing`` times, ``run`` puts these
together and judges every result first; ``report`` prints, ``compare`` finds what got slower, ``plot`` draws.
"""
