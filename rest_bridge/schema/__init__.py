"""What every route takes and answers, as pydantic models, and the OpenAPI document that is made from them.

Only the documentation and the tests import it: requests are read by `json_body.Fields`, and pydantic is large.
"""
