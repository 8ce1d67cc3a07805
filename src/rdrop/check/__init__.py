"""`check_rdrop`: can R-Drop act on this model and batch?"""

from .trial import CheckReport as CheckReport
from .trial import Finding as Finding
from .trial import check_rdrop as check_rdrop
