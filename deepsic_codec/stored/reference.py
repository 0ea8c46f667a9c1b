"""Coordinate reference systems as text."""

import json
import re
from collections.abc import Mapping
from typing import Any

from deepsic_codec.errors import ConfigurationError

_AUTHORITY = re.compile(r"([A-Za-z]\w{1,15}):(\w{1,15})")  # EPSG:32632, ESRI:54009, OGC:CRS84


def parse_crs(crs: Any) -> Any:
    """Return an attribute `crs` as a coordinate reference system of rasterio.

    The text is parsed. GDAL would also open the file or URL that it names.

    Parameters
    ----------
    crs : str, int or dict
        The code of an authority such as "EPSG:32632", the number of an EPSG code, WKT, or PROJJSON as text or dict.

    Raises
    ------
    ConfigurationError
        If it is none of these.
    """
    from rasterio.crs import CRS
    from rasterio.errors import CRSError

    expected = f"crs: expected a code such as EPSG:32632, WKT or PROJJSON, got {str(crs)[:80]!r}"
    try:
        if isinstance(crs, str) and crs.lstrip().startswith("{"):
            crs = json.loads(crs)
        if isinstance(crs, int):
            return CRS.from_epsg(crs)
        if isinstance(crs, Mapping):  # PROJ's own dicts can name grids and files
            if "type" not in crs or {"proj", "init"} & crs.keys():
                raise ConfigurationError(expected)
            return CRS.from_dict(dict(crs))
        code = _AUTHORITY.fullmatch(str(crs).strip())
        return CRS.from_authority(*code.groups()) if code else CRS.from_wkt(str(crs))
    except (CRSError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ConfigurationError(expected) from error
