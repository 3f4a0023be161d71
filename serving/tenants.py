"""To whose account a request goes."""

from __future__ import annotations

from starlette.datastructures import Headers

from serving.errors import shown
from sloraj.errors import InvalidRequest
from sloraj.request import MAX_TENANT_NAME

TENANT_HEADER = "x-sloraj-tenant"


def tenant_of(tenant_from: str, headers: Headers, user: str | None) -> str | None:
    """What `ServerConfig.tenant_from` names; None, if it was not sent: the adapter is the tenant.

    Raises InvalidRequest naming the field or the header.
    """
    if tenant_from == "user":
        return None if user is None else _checked("user", [user])
    if tenant_from == "header":
        sent = headers.getlist(TENANT_HEADER)
        return _checked(TENANT_HEADER, sent) if sent else None
    return None


def _checked(name: str, sent: list[str]) -> str:
    tenant = sent[0]
    if len(sent) > 1 or not 1 <= len(tenant) <= MAX_TENANT_NAME or not tenant.isprintable():
        raise InvalidRequest(
            f"{name}: got {shown(tenant if len(sent) == 1 else sent)}, allowed: one name of 1 to "
            f"{MAX_TENANT_NAME} printable characters",
            param=name,
        )
    return tenant
