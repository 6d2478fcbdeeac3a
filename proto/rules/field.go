package rules

import (
	"strconv"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// Field paths are written as in violations: names joined by dots, list items as
// [0], map entries as ["key"].

// FieldPath is the path of a field of parent, which may be "".
func FieldPath(parent, name string) string {
	if parent == "" {
		return name
	}
	return parent + "." + name
}

// ItemPath is the path of a list's item.
func ItemPath(parent string, index int) string {
	return parent + "[" + strconv.Itoa(index) + "]"
}

// EntryPath is the path of a map's entry.
func EntryPath(parent, key string) string {
	return parent + "[" + strconv.Quote(Shorten(key)) + "]"
}

// IsSecret says whether a field is write-only.
func IsSecret(field protoreflect.FieldDescriptor) bool {
	secret, _ := proto.GetExtension(field.Options(), resealv1.E_Secret).(bool)
	return secret
}

// IsDuration says whether a field holds a duration.
func IsDuration(field protoreflect.FieldDescriptor) bool {
	return field.Message() != nil && field.Message().FullName() == "google.protobuf.Duration"
}
