package frontend

import (
	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// edit applies the edits of a route: first remove, then set, then add.
func edit(fields *exchange.Fields, edits *resealv1.HeaderEdits) {
	if edits == nil {
		return
	}
	for _, name := range edits.GetRemove() {
		fields.Del(name)
	}
	for name, value := range edits.GetSet() {
		fields.Set(name, value)
	}
	for name, value := range edits.GetAdd() {
		fields.Add(name, value)
	}
}

// headerBytes is the size of a request's header as HTTP/1.1 writes it.
func headerBytes(r *exchange.Request) int {
	size := len(r.Method) + len(r.Target) + len(r.Authority) + len("  HTTP/1.1\r\nHost: \r\n\r\n")
	for i := range r.Fields {
		size += len(r.Fields[i].Name) + len(r.Fields[i].Value) + len(": \r\n")
	}
	return size
}
