"""Time the providers on the shapes of a real deployment: the ``bench`` command, and the uses of its results.

``shapes`` lists the rows, ``inputs`` draws them on the device, ``timing`` times, ``run`` combines these and judges
every result first. ``results`` has the result file, ``compare`` finds what got slower, ``plot`` draws, and ``tune``
makes the table of the measured choice.
"""
