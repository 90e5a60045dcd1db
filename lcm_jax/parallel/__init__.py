"""One program on many devices: the mesh, who holds which part of which weight, and what is exchanged in a step."""
