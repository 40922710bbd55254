"""The old place of :mod:`gisting.internalize`, whose modules can be imported from here for one release.

Each name warns and says what to use instead.
"""

from __future__ import annotations

import sys
from types import ModuleType

from gisting._deprecated import moved_names

__all__: list[str] = []

# For each old module, its names: "name", "name=new_name" or "name=new_module.new_name".
_MODULES = {
    "compressors": "LLMLingua2=shorteners.LLMLingua2 NoCompression=shorteners.NoShortening "
    "Rewrites=shorteners.Rewrites SelfInformation=shorteners.SelfInformation "
    "TemplateCompressor=shorteners.Shortener compress_template=shorteners.shorten "
    "realised_share=shorteners.realised_share",
    "examples": "ExamplePool",
    "layout": "PromptLayout=requests.PromptFormat Requests=requests.Requests lay_out=requests.make_requests",
    "plan": "CONTROLS TAILS Plan Stage make_plan num_steps split_steps warmup_of",
    "prices": "Prices load_prices",
    "report": "BARE_QUERY=comparison.BARE_QUERY FULL_PROMPT=comparison.FULL_PROMPT "
    "PREFIX_CACHE=comparison.PREFIX_CACHE Report RequestRow=comparison.RequestRow StageRow=comparison.StageRow "
    "Times=comparison.Times make_report num_rows_read=comparison.num_rows_read "
    "shared_prefix=comparison.shared_prefix",
    "result": "RESULT_NAME Internalized StageResult TemplateWarning=PromptWarning check_template=check_prompt "
    "load_internalized template_hash=prompt_hash",
    "schedule": "SCHEDULES Schedule",
    "stages": "internalize",
}

for _name, _names in _MODULES.items():
    _places = {}
    for _entry in _names.split():
        _old, _, _new = _entry.partition("=")
        _new = _new or _old
        _places[_old] = f"gisting.internalize.{_new if '.' in _new else f'{_name}.{_new}'}"
    _module = ModuleType(f"{__name__}.{_name}")
    vars(_module)["__getattr__"] = moved_names(_module.__name__, _places)
    sys.modules[_module.__name__] = globals()[_name] = _module
