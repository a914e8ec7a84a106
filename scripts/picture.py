from dataclasses import dataclass, field
@dataclass
class History:
    seconds: float = 0.0
    loss: list = field(default_factory=list)
    dice: list = field(default_factory=list)
def draw(): pass
