package manifest

import (
	_ "embed"
	"errors"
	"fmt"
	"slices"
	"strings"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
	"github.com/reseal/reseal/proto/rules"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
)

// descriptorSet is proto/reseal/v1 with its comments, which generated code does
// not hold.
//
//go:embed reseal.binpb
var descriptorSet []byte

// ErrNotDocumented is the error of Explain for a kind or field that does not
// exist.
var ErrNotDocumented = errors.New("nothing to explain")

// Doc explains a kind or a field.
type Doc struct {
	// Path as it is written in full, for example "BackendPool.connections.reuse".
	Path string
	// Type in words: "string", "boolean", "integer", "duration", "time", "enum",
	// "object", for lists "list of ", for maps "map to " and one of them.
	Type string
	// Comment is the documentation: paragraphs without line breaks, separated by
	// an empty line. For fields of type object it also describes the type.
	Comment string
	// Values are the values of an enum.
	Values []DocValue
	// Fields are the fields of an object, or of a list's or map's objects.
	Fields []DocField
	// Secret: the value is write-only and never shown.
	Secret bool
	// Assigned: the control plane sets it; what a manifest says is ignored.
	Assigned bool
}

// DocValue is one value of an enum.
type DocValue struct {
	// Name as in manifests, for example "least_request".
	Name string
	// Comment is its documentation.
	Comment string
}

// DocField is one field of an object.
type DocField struct {
	// Name as in manifests, for example "healthCheck".
	Name string
	// Type as in Doc.
	Type string
	// Comment is its documentation.
	Comment string
	// OneOf names the other fields of which at most one may be set.
	OneOf []string
}

// Explain documents a kind or a field of it from the comments of the protocol.
// The path is a kind, in any form that KindByName takes, and field names, for
// example "BackendPool.connections.reuse". Fields of spec follow the kind at
// once; "spec" and "metadata" may also be written. Errors wrap ErrNotDocumented.
func Explain(path string) (Doc, error) {
	kindName, rest, _ := strings.Cut(strings.Trim(path, "."), ".")
	kind, ok := KindByName(kindName)
	if !ok {
		return Doc{}, fmt.Errorf("%w: %s is not a kind%s", ErrNotDocumented, rules.Quote(kindName), kindHint(kindName))
	}
	message, err := documentedMessage(protoreflect.FullName("reseal.v1." + kind))
	if err != nil {
		return Doc{}, err
	}
	steps := splitPath(rest)
	if len(steps) > 0 && strings.EqualFold(steps[0].name, "spec") {
		steps = steps[1:]
	}
	if len(steps) > 0 && strings.EqualFold(steps[0].name, "metadata") {
		if message, err = documentedMessage("reseal.v1.Resource"); err != nil {
			return Doc{}, err
		}
	}
	if len(steps) == 0 {
		return Doc{Path: kind, Type: "object", Comment: comment(message), Fields: docFields(message)}, nil
	}
	return explainField(kind, message, steps)
}

func kindHint(name string) string {
	if hint := rules.DidYouMean(name, resealv1.Kinds); hint != "" {
		return hint
	}
	return "; it is one of " + rules.OneOf(resealv1.Kinds)
}

// explainField follows the steps down from a kind's message.
func explainField(kind string, message protoreflect.MessageDescriptor, steps []pathStep) (Doc, error) {
	path, field := kind, protoreflect.FieldDescriptor(nil)
	for _, step := range steps {
		if step.index >= 0 {
			continue
		}
		if message == nil {
			return Doc{}, fmt.Errorf("%w: %s has no fields", ErrNotDocumented, path)
		}
		fields := message.Fields()
		if field = fieldFold(fields, step.name); field == nil {
			names := fieldNames(fields)
			hint := rules.DidYouMean(step.name, names)
			if hint == "" {
				hint = "; it has " + strings.Join(names, ", ")
			}
			return Doc{}, fmt.Errorf("%w: %s has no field %s%s", ErrNotDocumented, path, rules.Quote(step.name), hint)
		}
		path = rules.FieldPath(path, field.JSONName())
		message = objectOf(field)
	}
	if field == nil {
		return Doc{}, fmt.Errorf("%w: %s is not a list", ErrNotDocumented, kind)
	}
	return fieldDoc(path, field), nil
}

func fieldDoc(path string, field protoreflect.FieldDescriptor) Doc {
	doc := Doc{
		Path: path, Type: docType(field), Comment: comment(field),
		Secret: rules.IsSecret(field), Assigned: isAssigned(field),
	}
	if message := objectOf(field); message != nil {
		doc.Fields = docFields(message)
		if about := comment(message); about != "" {
			doc.Comment = strings.TrimPrefix(doc.Comment+"\n\n"+about, "\n\n")
		}
	}
	if enum := field.Enum(); enum != nil {
		for i := range enum.Values().Len() {
			if value := enum.Values().Get(i); value.Number() != 0 {
				doc.Values = append(doc.Values, DocValue{Name: resealv1.ValueLabel(value), Comment: comment(value)})
			}
		}
	}
	return doc
}

func docFields(message protoreflect.MessageDescriptor) []DocField {
	fields := message.Fields()
	docs := make([]DocField, fields.Len())
	for i := range docs {
		field := fields.Get(i)
		docs[i] = DocField{Name: field.JSONName(), Type: docType(field), Comment: comment(field)}
		if oneof := field.ContainingOneof(); oneof != nil && !oneof.IsSynthetic() {
			isSelf := func(name string) bool { return name == field.JSONName() }
			docs[i].OneOf = slices.DeleteFunc(fieldNames(oneof.Fields()), isSelf)
		}
	}
	return docs
}

// objectOf is the message that a field's values hold fields of, or nil.
func objectOf(field protoreflect.FieldDescriptor) protoreflect.MessageDescriptor {
	if field.IsMap() {
		return nil
	}
	if message := field.Message(); message != nil && message.ParentFile().Package() == "reseal.v1" {
		return message
	}
	return nil
}

func docType(field protoreflect.FieldDescriptor) string {
	switch {
	case field.IsMap():
		return "map to " + singleType(field.MapValue())
	case field.IsList():
		return "list of " + singleType(field)
	}
	return singleType(field)
}

func singleType(field protoreflect.FieldDescriptor) string {
	switch field.Kind() {
	case protoreflect.StringKind:
		return "string"
	case protoreflect.BoolKind:
		return "boolean"
	case protoreflect.EnumKind:
		return "enum"
	case protoreflect.MessageKind:
		switch field.Message().FullName() {
		case "google.protobuf.Duration":
			return "duration"
		case "google.protobuf.Timestamp":
			return "time"
		}
		return "object"
	}
	return "integer"
}

func fieldFold(fields protoreflect.FieldDescriptors, name string) protoreflect.FieldDescriptor {
	for i := range fields.Len() {
		if field := fields.Get(i); strings.EqualFold(field.JSONName(), name) {
			return field
		}
	}
	return nil
}

// comment is the documentation of a descriptor: lines of a paragraph joined,
// paragraphs separated by an empty line.
func comment(d protoreflect.Descriptor) string {
	text := d.ParentFile().SourceLocations().ByDescriptor(d).LeadingComments
	var paragraphs []string
	for paragraph := range strings.SplitSeq(text, "\n\n") {
		if words := strings.Fields(paragraph); len(words) > 0 {
			paragraphs = append(paragraphs, strings.Join(words, " "))
		}
	}
	return strings.Join(paragraphs, "\n\n")
}

// documentedMessage finds a message with its comments.
func documentedMessage(name protoreflect.FullName) (protoreflect.MessageDescriptor, error) {
	files, err := documentedFiles()
	if err != nil {
		return nil, err
	}
	found, err := files.FindDescriptorByName(name)
	if err != nil {
		return nil, fmt.Errorf("find %s: %w", name, err)
	}
	message, ok := found.(protoreflect.MessageDescriptor)
	if !ok {
		return nil, fmt.Errorf("%s is not a message", name)
	}
	return message, nil
}

// documentedFiles reads the descriptor set. Each call reads it anew, which takes
// about a millisecond: it is only needed when somebody asks for documentation.
func documentedFiles() (*protoregistry.Files, error) {
	var set descriptorpb.FileDescriptorSet
	if err := proto.Unmarshal(descriptorSet, &set); err != nil {
		return nil, fmt.Errorf("read the descriptor set: %w", err)
	}
	files := new(protoregistry.Files)
	for _, file := range set.File {
		descriptor, err := protodesc.NewFile(file, importResolver{files})
		if err != nil {
			return nil, fmt.Errorf("read %s of the descriptor set: %w", file.GetName(), err)
		}
		if err := files.RegisterFile(descriptor); err != nil {
			return nil, fmt.Errorf("register %s: %w", file.GetName(), err)
		}
	}
	return files, nil
}

// importResolver finds what the set imports: in the set, or, for
// google/protobuf, among the generated code.
type importResolver struct{ set *protoregistry.Files }

func (r importResolver) FindFileByPath(path string) (protoreflect.FileDescriptor, error) {
	if file, err := r.set.FindFileByPath(path); err == nil {
		return file, nil
	}
	return protoregistry.GlobalFiles.FindFileByPath(path)
}

func (r importResolver) FindDescriptorByName(name protoreflect.FullName) (protoreflect.Descriptor, error) {
	if descriptor, err := r.set.FindDescriptorByName(name); err == nil {
		return descriptor, nil
	}
	return protoregistry.GlobalFiles.FindDescriptorByName(name)
}
