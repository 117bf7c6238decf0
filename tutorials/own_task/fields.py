"""For convert_data.py --transform: a row of data/repairs.csv becomes a record with four answers."""

FIELDS = ("姓名", "房号", "故障", "时间")


def repair(row):
    return {
        "document": row["留言"],
        "prompt": "抽取报修信息",
        "<ans>": {field: row[field] or "无" for field in FIELDS},
    }
