"""All that speaks to AWS. boto3 is imported when it is used; it is the extra `aws`."""
