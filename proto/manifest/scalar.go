package manifest

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
	"github.com/reseal/reseal/proto/rules"
	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/durationpb"
)

// scalar reads a scalar or duration. Errors say what the field wants.
func scalar(n *yaml.Node, field protoreflect.FieldDescriptor) (protoreflect.Value, error) {
	none := protoreflect.Value{}
	if n.Kind != yaml.ScalarNode {
		return none, fmt.Errorf("must be %s, not a list or mapping", typeWords(field))
	}
	if isNull(n) {
		return none, fmt.Errorf("is empty; it must be %s", typeWords(field))
	}
	switch field.Kind() {
	case protoreflect.StringKind:
		return textValue(n, field)
	case protoreflect.BoolKind:
		value, err := strconv.ParseBool(strings.ToLower(n.Value))
		if n.Tag != "!!bool" || err != nil {
			return none, fmt.Errorf("%s is neither true nor false", rules.Quote(n.Value))
		}
		return protoreflect.ValueOfBool(value), nil
	case protoreflect.Uint32Kind:
		value, err := strconv.ParseUint(n.Value, 10, 32)
		if n.Tag != "!!int" || err != nil || n.Value != strconv.FormatUint(value, 10) {
			return none, fmt.Errorf("%s is not a whole number from 0 to 4294967295", rules.Quote(n.Value))
		}
		return protoreflect.ValueOfUint32(uint32(value)), nil
	case protoreflect.EnumKind:
		return enumValue(n, field.Enum())
	case protoreflect.MessageKind:
		value, err := duration(n)
		if err != nil {
			return none, err
		}
		return protoreflect.ValueOfMessage(durationpb.New(value).ProtoReflect()), nil
	default:
		return none, fmt.Errorf("a manifest can't hold a %s", field.Kind())
	}
}

func textValue(n *yaml.Node, field protoreflect.FieldDescriptor) (protoreflect.Value, error) {
	if isText(n) {
		return protoreflect.ValueOfString(n.Value), nil
	}
	if rules.IsSecret(field) {
		return protoreflect.Value{}, errors.New("must be text; put it in quotes")
	}
	return protoreflect.Value{}, fmt.Errorf("must be text; put %s in quotes", rules.Shorten(n.Value))
}

// duration reads what time.ParseDuration reads, 0 or more.
func duration(n *yaml.Node) (time.Duration, error) {
	value, err := time.ParseDuration(n.Value)
	switch {
	case err != nil && n.Tag == "!!int":
		return 0, fmt.Errorf("%s has no unit; write %ss for seconds", rules.Shorten(n.Value), rules.Shorten(n.Value))
	case err != nil:
		return 0, fmt.Errorf("%s is not a duration; write for example 250ms, 1m30s or 12h", rules.Quote(n.Value))
	case value < 0:
		return 0, fmt.Errorf("%s is negative", rules.Quote(n.Value))
	}
	return value, nil
}

// enumValue finds the value that a label names: in any case, with "-", "." and
// "_" alike.
func enumValue(n *yaml.Node, enum protoreflect.EnumDescriptor) (protoreflect.Value, error) {
	values := enum.Values()
	for i := range values.Len() {
		value := values.Get(i)
		if value.Number() != 0 && foldLabel(resealv1.ValueLabel(value)) == foldLabel(n.Value) {
			return protoreflect.ValueOfEnum(value.Number()), nil
		}
	}
	labels := rules.EnumLabels(enum)
	hint := rules.DidYouMean(n.Value, labels)
	if hint == "" {
		hint = "; it is one of " + rules.OneOf(labels)
	}
	return protoreflect.Value{}, fmt.Errorf("%s is not known%s", rules.Quote(n.Value), hint)
}

func foldLabel(label string) string {
	return strings.NewReplacer("-", "_", ".", "_").Replace(strings.ToLower(label))
}

// typeWords names the type of a scalar in an error.
func typeWords(field protoreflect.FieldDescriptor) string {
	switch field.Kind() {
	case protoreflect.BoolKind:
		return "true or false"
	case protoreflect.Uint32Kind:
		return "a whole number"
	case protoreflect.EnumKind:
		return rules.OneOf(rules.EnumLabels(field.Enum()))
	case protoreflect.MessageKind:
		return "a duration such as 10s"
	default:
		return "text"
	}
}
