package store

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// keys are the names of the store's keys.
type keys struct{ prefix string }

func (k keys) head() string      { return k.prefix + "head" }
func (k keys) fence() string     { return k.prefix + "fence" }
func (k keys) resources() string { return k.prefix + "resources/" }
func (k keys) histories() string { return k.prefix + "history/" }

func (k keys) resource(ref *resealv1.ResourceRef) string { return k.resources() + ref.Key() }

func (k keys) history(sequence int64) string {
	return fmt.Sprintf("%s%020d", k.histories(), sequence)
}

// sequence is the inverse of history.
func (k keys) sequence(key string) (int64, error) {
	return strconv.ParseInt(strings.TrimPrefix(key, k.histories()), 10, 64)
}

// record describes one change. It is stored as JSON: under the head key without
// undo, under a history key with it. The revision of a change is the etcd
// revision of its keys, so it isn't in the value.
type record struct {
	// Sequence numbers the changes without gaps, from 1.
	Sequence int64 `json:"sequence"`
	// ApplyID is random. It tells after a timeout whose change a record is.
	ApplyID string    `json:"applyId"`
	Author  string    `json:"author,omitempty"`
	Message string    `json:"message,omitempty"`
	Time    time.Time `json:"time"`
	// RolledBackTo is set when the change was a rollback.
	RolledBackTo int64 `json:"rolledBackTo,omitempty"`
	// LargeAllowed is set when the change was large, which its author allowed.
	LargeAllowed bool `json:"largeAllowed,omitempty"`
	// Now is ApplyRequest.now.
	Now bool `json:"now,omitempty"`
	// Count is the number of resources that changed.
	Count int `json:"count"`
	// Undo leads back to the state before the change.
	Undo []undo `json:"undo,omitempty"`
}

// undo is one resource as it was before a change.
type undo struct {
	Kind string `json:"kind"`
	Name string `json:"name"`
	// Before is the marshalled resource with its revision, secrets sealed.
	// Absent when the change created it.
	Before []byte `json:"before,omitempty"`
}

func decodeRecord(value []byte) (*record, error) {
	r := &record{}
	if err := json.Unmarshal(value, r); err != nil {
		return nil, fmt.Errorf("damaged record of a change: %w", err)
	}
	return r, nil
}

func (r *record) encode() ([]byte, error) {
	value, err := json.Marshal(r)
	if err != nil {
		return nil, fmt.Errorf("encode the record of a change: %w", err)
	}
	return value, nil
}

// resource is the resource before the change, nil when there was none.
func (u undo) resource() (*resealv1.Resource, error) {
	if u.Before == nil {
		return nil, nil
	}
	resource := &resealv1.Resource{}
	if err := proto.Unmarshal(u.Before, resource); err != nil {
		return nil, fmt.Errorf("damaged history of %s/%s: %w", u.Kind, u.Name, err)
	}
	return resource, nil
}

func (u undo) ref() *resealv1.ResourceRef {
	return &resealv1.ResourceRef{Kind: u.Kind, Name: u.Name}
}

// errUnknownKind is the error of a stored resource of a kind that this version
// doesn't know: a newer replica wrote it.
var errUnknownKind = errors.New("kind is not known to this version")

// encodeResource is the canonical encoding.
func encodeResource(resource *resealv1.Resource) ([]byte, error) {
	value, err := proto.MarshalOptions{Deterministic: true}.Marshal(resource)
	if err != nil {
		return nil, fmt.Errorf("encode %s: %w", resource.Ref().Key(), err)
	}
	return value, nil
}

// decodeResource decodes the value of the resource key with suffix key, and
// fills in the revision.
func decodeResource(key string, value []byte, revision int64) (*resealv1.Resource, error) {
	kind, _, _ := strings.Cut(key, "/")
	if !slices.Contains(resealv1.Kinds, kind) {
		return nil, fmt.Errorf("%s: %w", key, errUnknownKind)
	}
	resource := &resealv1.Resource{}
	if err := proto.Unmarshal(value, resource); err != nil {
		return nil, fmt.Errorf("damaged resource %s: %w", key, err)
	}
	if stored := resource.Ref().Key(); stored != key {
		return nil, fmt.Errorf("damaged resource %s: its value is %s", key, stored)
	}
	resource.Metadata.Revision = revision
	return resource, nil
}
