package resealv1

import (
	"strings"

	"google.golang.org/protobuf/reflect/protoreflect"
)

// Kinds are the kinds of resources, in the order in which they are shown.
var Kinds = []string{"BackendPool", "TLSPolicy", "Listener", "Route", "Certificate", "Keyring", "RolloutPolicy"}

// Kind is the kind of r as written in manifests, for example "BackendPool".
// It is "" when no spec is set.
func (r *Resource) Kind() string {
	m := r.SpecMessage()
	if m == nil {
		return ""
	}
	return string(m.Descriptor().Name())
}

// Ref names r.
func (r *Resource) Ref() *ResourceRef {
	return &ResourceRef{Kind: r.Kind(), Name: r.GetMetadata().GetName()}
}

// SpecMessage is the member of spec that is set, or nil.
func (r *Resource) SpecMessage() protoreflect.Message {
	m := r.ProtoReflect()
	field := m.WhichOneof(m.Descriptor().Oneofs().ByName("spec"))
	if field == nil {
		return nil
	}
	return m.Get(field).Message()
}

// NewResource is an empty resource of a kind, or nil when there is no such
// kind.
func NewResource(kind string) *Resource {
	r := &Resource{Metadata: &Metadata{}}
	m := r.ProtoReflect()
	fields := m.Descriptor().Oneofs().ByName("spec").Fields()
	for i := range fields.Len() {
		if field := fields.Get(i); string(field.Message().Name()) == kind {
			m.Set(field, m.NewField(field))
			return r
		}
	}
	return nil
}

// Key is "Kind/name", the form in which messages and errors name resources.
func (r *ResourceRef) Key() string {
	return r.GetKind() + "/" + r.GetName()
}

// Label is an enum value as it stands in manifests, metrics and statistics:
// without the enum's prefix, in lower case, with a dot between digits. For
// example "no_session" or "tls1.2". It is "" for the zero value.
func Label(value protoreflect.Enum) string {
	if value.Number() == 0 {
		return ""
	}
	desc := value.Descriptor().Values().ByNumber(value.Number())
	if desc == nil {
		return "unknown"
	}
	return ValueLabel(desc)
}

// ValueLabel is Label for a value's descriptor.
func ValueLabel(desc protoreflect.EnumValueDescriptor) string {
	values := desc.Parent().(protoreflect.EnumDescriptor).Values()
	prefix := strings.TrimSuffix(string(values.Get(0).Name()), "UNSPECIFIED")
	name := []byte(strings.ToLower(strings.TrimPrefix(string(desc.Name()), prefix)))
	for i := 1; i+1 < len(name); i++ {
		if name[i] == '_' && isDigit(name[i-1]) && isDigit(name[i+1]) {
			name[i] = '.'
		}
	}
	return string(name)
}

func isDigit(b byte) bool { return '0' <= b && b <= '9' }
