"""T-TAME: explanation maps for frozen image classifiers in one forward pass.

``__init__.pyi`` lists what is here. It is imported when it is first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
