"""Make the buckets named as arguments, where they are missing, on the S3 server that AWS_ENDPOINT_URL names."""

import sys

import boto3

s3 = boto3.client("s3")
standing = {bucket["Name"] for bucket in s3.list_buckets()["Buckets"]}
for name in sys.argv[1:]:
    if name not in standing:
        s3.create_bucket(Bucket=name)
