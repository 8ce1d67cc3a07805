"""`check_rdrop`: can R-Drop act on this model and batch?"""

from .check import check_rdrop as check_rdrop
from .report import CheckReport as CheckReport
from .report import Finding as Finding
