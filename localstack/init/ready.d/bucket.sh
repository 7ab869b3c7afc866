#!/usr/bin/env bash
# Run by LocalStack's container when it is ready: the bucket and the role that cloud.py makes.
set -euo pipefail
awslocal s3 mb "s3://${BUCKET:-sagemaker-us-east-1-000000000000}"
awslocal iam create-role --role-name SageMakerExecutionRole --assume-role-policy-document \
  '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Principal": {"Service": "sagemaker.amazonaws.com"}, "Action": "sts:AssumeRole"}]}'
awslocal iam attach-role-policy --role-name SageMakerExecutionRole --policy-arn arn:aws:iam::aws:policy/AmazonSageMakerFullAccess
