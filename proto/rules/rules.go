// Package rules says which resources an edge can serve, as far as that can be
// told without files, sockets and key material that may be sealed. The control
// plane refuses by them what operators apply, and each edge what it is sent, so
// that a rule stands in one place. What the rules admit, package plan of the edge
// compiles, once the files that it names can be read.
package rules

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/durationpb"
)

const (
	// maxViolations bounds what is reported of one resource.
	maxViolations = 100
	// maxDuration bounds every duration, about 10 years: more is a mistake, and
	// it is far from overflow.
	maxDuration = 87600 * time.Hour

	maxLabels          = 64
	maxAnnotationBytes = 16 << 10
)

// Written checks all fields of a resource that an operator wrote, without looking
// at other resources. It is stricter than Resource in one point: fields that this
// version does not know are refused. The description of a violation never holds a
// secret. At most 100 violations are returned.
//
// A Certificate with certificatePem and without privateKeyPem is valid here: the
// store may hold the key.
func Written(r *resealv1.Resource) []*resealv1.Violation {
	return check(&checker{ref: r.Ref(), strict: true}, r)
}

// Resource checks all fields of a resource that was admitted by another process,
// maybe of a newer version: fields that this one does not know are not violations.
// The rest is as for Written.
func Resource(r *resealv1.Resource) []*resealv1.Violation {
	return check(&checker{ref: r.Ref()}, r)
}

func check(c *checker, r *resealv1.Resource) []*resealv1.Violation {
	spec := r.SpecMessage()
	if spec == nil {
		c.failf("", "has no spec; its kind is one of %s", OneOf(resealv1.Kinds))
		return c.violations
	}
	c.metadata(r.GetMetadata())
	c.generic(spec, "spec")
	switch spec := spec.Interface().(type) {
	case *resealv1.BackendPool:
		c.backendPool(spec)
	case *resealv1.TLSPolicy:
		c.tlsPolicy(spec)
	case *resealv1.Listener:
		c.listener(spec)
	case *resealv1.Route:
		c.route(spec)
	case *resealv1.Certificate:
		c.certificate(spec)
	case *resealv1.Keyring:
		c.keyring(spec)
	case *resealv1.RolloutPolicy:
		c.rolloutPolicy(spec)
	}
	return c.violations
}

// checker collects the violations of one resource.
type checker struct {
	ref        *resealv1.ResourceRef
	strict     bool // refuses unknown fields
	violations []*resealv1.Violation
}

func (c *checker) failf(path, format string, args ...any) {
	if len(c.violations) >= maxViolations {
		return
	}
	c.violations = append(c.violations, &resealv1.Violation{
		Resource: c.ref, Field: path, Description: fmt.Sprintf(format, args...),
	})
}

// err reports what a check returned, if anything.
func (c *checker) err(path string, err error) {
	if err != nil {
		c.failf(path, "%s", err)
	}
}

// optional applies a check to a value that may be left out.
func (c *checker) optional(path, value string, check func(string) error) {
	if value != "" {
		c.err(path, check(value))
	}
}

// each applies a check to the items of a list and refuses those that are there
// twice.
func (c *checker) each(path string, values []string, check func(string) error) {
	first := make(map[string]int, len(values))
	for i, value := range values {
		if earlier, ok := first[value]; ok {
			c.failf(ItemPath(path, i), "%s is there twice, first as item %d", Quote(value), earlier)
			continue
		}
		first[value] = i
		c.err(ItemPath(path, i), check(value))
	}
}

// atLeast checks the lower bound of a duration that is set.
func (c *checker) atLeast(path string, value *durationpb.Duration, least time.Duration) {
	if value != nil && value.AsDuration() < least && value.AsDuration() > 0 {
		c.failf(path, "%s is below the minimum, %s", DurationText(value.AsDuration()), DurationText(least))
	}
}

// atMost checks the upper bound of a number.
func (c *checker) atMost(path string, value, most uint32) {
	if value > most {
		c.failf(path, "%d is above the maximum, %d", value, most)
	}
}

func (c *checker) metadata(m *resealv1.Metadata) {
	if m.GetName() == "" {
		c.failf("metadata.name", "is missing; name the resource")
	} else {
		c.err("metadata.name", checkName(m.Name))
	}
	c.labels("metadata.labels", m.GetLabels())
	annotations, size := m.GetAnnotations(), 0
	for key, value := range annotations {
		size += len(key) + len(value)
	}
	switch {
	case len(annotations) > maxLabels:
		c.failf("metadata.annotations", "holds %d entries; at most %d are allowed", len(annotations), maxLabels)
	case size > maxAnnotationBytes:
		c.failf("metadata.annotations", "holds %d bytes; at most %d are allowed", size, maxAnnotationBytes)
	default:
		for _, key := range sortedKeys(annotations) {
			c.err(EntryPath("metadata.annotations", key), checkLabelKey(key))
		}
	}
}

func (c *checker) labels(path string, labels map[string]string) {
	if len(labels) > maxLabels {
		c.failf(path, "holds %d entries; at most %d are allowed", len(labels), maxLabels)
		return
	}
	for _, key := range sortedKeys(labels) {
		c.err(EntryPath(path, key), checkLabelKey(key))
		c.err(EntryPath(path, key), checkLabelValue(labels[key]))
	}
}

func (c *checker) selector(selector *resealv1.EdgeSelector) {
	c.labels("spec.edgeSelector.matchLabels", selector.GetMatchLabels())
}

// generic checks what holds for every field of its type. Messages that come
// over the wire can hold more than a manifest.
func (c *checker) generic(m protoreflect.Message, path string) {
	if c.strict && len(m.GetUnknown()) > 0 {
		c.failf(path, "holds a field that this version does not know")
	}
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		field := fields.Get(i)
		if !m.Has(field) || field.IsMap() {
			continue
		}
		fieldPath, value := FieldPath(path, field.JSONName()), m.Get(field)
		if !field.IsList() {
			c.genericValue(field, value, fieldPath)
			continue
		}
		for i := range value.List().Len() {
			c.genericValue(field, value.List().Get(i), ItemPath(fieldPath, i))
		}
	}
}

func (c *checker) genericValue(field protoreflect.FieldDescriptor, value protoreflect.Value, path string) {
	switch {
	case IsDuration(field):
		c.genericDuration(field, value.Message().Interface().(*durationpb.Duration), path)
	case field.Message() != nil:
		c.generic(value.Message(), path)
	case field.Enum() != nil:
		if value.Enum() == 0 || field.Enum().Values().ByNumber(value.Enum()) == nil {
			c.failf(path, "%d is not known; it is one of %s", value.Enum(), OneOf(EnumLabels(field.Enum())))
		}
	case IsSecret(field) && strings.TrimSpace(value.String()) == resealv1.SecretMarker:
		c.failf(path, "is the mark of a value that is not shown; leave the field out to keep the stored value")
	}
}

// mayBeZero says for which durations 0 has a meaning: do not wait, or end at
// once.
func mayBeZero(field protoreflect.FullName) bool {
	return slices.Contains([]protoreflect.FullName{
		"reseal.v1.Sessions.coalesce_timeout",
		"reseal.v1.Sessions.ticket_wait",
		"reseal.v1.Connections.close_timeout",
		"reseal.v1.ListenerTimeouts.drain",
		"reseal.v1.Keyring.retire_after",
		"reseal.v1.RolloutStage.soak",
	}, field)
}

func (c *checker) genericDuration(field protoreflect.FieldDescriptor, value *durationpb.Duration, path string) {
	switch d := value.AsDuration(); {
	case value.CheckValid() != nil:
		c.failf(path, "is not a valid duration")
	case d < 0:
		c.failf(path, "%s is negative", DurationText(d))
	case d == 0 && !mayBeZero(field.FullName()):
		c.failf(path, "must be above 0; leave it out for the default")
	case d > maxDuration:
		c.failf(path, "%s is above the maximum, %s", DurationText(d), DurationText(maxDuration))
	}
}

func (c *checker) keyring(k *resealv1.Keyring) {
	c.atLeast("spec.rotationInterval", k.RotationInterval, time.Minute)
	full := k.WithDefaults()
	rotation, age := full.RotationInterval.AsDuration(), full.MaxActiveAge.AsDuration()
	if age > 0 && age < rotation {
		path := "spec.maxActiveAge"
		if k.MaxActiveAge == nil {
			path = "spec.rotationInterval"
		}
		c.failf(path, "maxActiveAge %s is below rotationInterval %s: edges would stop issuing tickets before the next epoch",
			DurationText(age), DurationText(rotation))
	}
	c.selector(k.EdgeSelector)
}

func sortedKeys(m map[string]string) []string { return slices.Sorted(maps.Keys(m)) }
