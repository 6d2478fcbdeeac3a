package main

import (
	"bytes"
	"encoding/json"
	"time"

	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// protoView is a message as -o json and yaml show it: every field is there, in
// the protocol's order, numbers are numbers, enums, durations and times stand as
// in manifests, and what is not set is null or "". Specs of resources hold only
// what is set.
type protoView struct{ message protoreflect.Message }

// MarshalJSON implements json.Marshaler.
func (v protoView) MarshalJSON() ([]byte, error) {
	switch m := v.message.Interface().(type) {
	case *durationpb.Duration:
		return json.Marshal(configured(m))
	case *timestamppb.Timestamp:
		return json.Marshal(m.AsTime().UTC().Format(time.RFC3339))
	}
	_, sparse := v.message.Interface().(*resealv1.BackendPool)
	return viewFields(v.message, sparse)
}

// viewFields writes the fields of a message. sparse leaves out what is not set.
func viewFields(message protoreflect.Message, sparse bool) ([]byte, error) {
	var out bytes.Buffer
	out.WriteByte('{')
	fields := message.Descriptor().Fields()
	for i := range fields.Len() {
		field := fields.Get(i)
		if sparse && !message.Has(field) {
			continue
		}
		value, err := json.Marshal(viewField(message, field, sparse))
		if err != nil {
			return nil, err
		}
		if out.Len() > 1 {
			out.WriteByte(',')
		}
		out.WriteString(`"` + field.JSONName() + `":`)
		out.Write(value)
	}
	out.WriteByte('}')
	return out.Bytes(), nil
}

// sparseView is a protoView within a resource's spec.
type sparseView struct{ message protoreflect.Message }

// MarshalJSON implements json.Marshaler.
func (v sparseView) MarshalJSON() ([]byte, error) {
	switch v.message.Interface().(type) {
	case *durationpb.Duration, *timestamppb.Timestamp:
		return protoView(v).MarshalJSON()
	}
	return viewFields(v.message, true)
}

func viewField(message protoreflect.Message, field protoreflect.FieldDescriptor, sparse bool) any {
	if !field.IsList() {
		if field.Message() != nil && !message.Has(field) {
			return nil
		}
		return viewValue(field, message.Get(field), sparse)
	}
	list := message.Get(field).List()
	items := make([]any, list.Len())
	for i := range items {
		items[i] = viewValue(field, list.Get(i), sparse)
	}
	return items
}

func viewValue(field protoreflect.FieldDescriptor, value protoreflect.Value, sparse bool) any {
	switch {
	case field.Message() != nil && sparse:
		return sparseView{value.Message()}
	case field.Message() != nil:
		return protoView{value.Message()}
	case field.Enum() != nil && value.Enum() == 0:
		return ""
	case field.Enum() != nil:
		if known := field.Enum().Values().ByNumber(value.Enum()); known != nil {
			return resealv1.ValueLabel(known)
		}
		return "unknown"
	}
	return value.Interface()
}
