package feed

import (
	"fmt"
	"sync"
	"sync/atomic"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// encoder turns resources into the bytes that edges get, with secrets in clear.
// The newest form of each resource is kept, so that a resource is marshalled
// once per change and not once per snapshot, view or edge. It serves one
// numbering of revisions: when they start anew, so does the encoder.
type encoder struct {
	unseal func(*resealv1.Resource) (*resealv1.Resource, error)
	work   *work

	mu     sync.Mutex
	newest map[string]form // by "Kind/name"
}

// work counts what was marshalled.
type work struct{ resources, updates atomic.Int64 }

func newEncoder(unseal func(*resealv1.Resource) (*resealv1.Resource, error), count *work) *encoder {
	return &encoder{unseal: unseal, work: count, newest: map[string]form{}}
}

type form struct {
	source *resealv1.Resource
	wire   *resealv1.EncodedResource
}

// holds says whether e is the form of resource. A resource that was read
// again, from history, is another object with the same facts.
func (e form) holds(resource *resealv1.Resource) bool {
	if e.source == resource {
		return true
	}
	ours, theirs := e.source.GetMetadata(), resource.GetMetadata()
	return ours.GetRevision() != 0 && ours.GetRevision() == theirs.GetRevision() && ours.GetUid() == theirs.GetUid()
}

// newestForm encodes a resource of the newest snapshot.
func (e *encoder) newestForm(resource *resealv1.Resource) (*resealv1.EncodedResource, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	key := resource.Ref().Key()
	kept, ok := e.newest[key]
	if ok && kept.holds(resource) {
		return kept.wire, nil
	}
	wire, err := e.encode(resource)
	if err != nil {
		return nil, err
	}
	if !ok || kept.source.GetMetadata().GetRevision() <= resource.GetMetadata().GetRevision() {
		e.newest[key] = form{resource, wire}
	}
	return wire, nil
}

// pastForm encodes a resource of an older snapshot.
func (e *encoder) pastForm(resource *resealv1.Resource) (*resealv1.EncodedResource, error) {
	e.mu.Lock()
	kept, ok := e.newest[resource.Ref().Key()]
	e.mu.Unlock()
	if ok && kept.holds(resource) {
		return kept.wire, nil
	}
	return e.encode(resource)
}

func (e *encoder) encode(resource *resealv1.Resource) (*resealv1.EncodedResource, error) {
	ref := resource.Ref()
	plain, err := e.unseal(resource)
	if err != nil {
		return nil, fmt.Errorf("%s can't be unsealed: %w", ref.Key(), err)
	}
	data, err := marshalDeterministic(plain)
	if err != nil {
		return nil, fmt.Errorf("%s can't be marshalled: %w", ref.Key(), err)
	}
	e.work.resources.Add(1)
	return &resealv1.EncodedResource{Kind: ref.Kind, Name: ref.Name, Resource: data}, nil
}

func (e *encoder) marshal(response *resealv1.SyncResponse) ([]byte, error) {
	e.work.updates.Add(1)
	return marshalDeterministic(response)
}

// retain forgets resources that snapshot does not hold.
func (e *encoder) retain(snapshot *resealv1.Snapshot) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for key, kept := range e.newest {
		if snapshot.Get(kept.wire.Kind, kept.wire.Name) == nil {
			delete(e.newest, key)
		}
	}
}
