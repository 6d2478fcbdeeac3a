package feed

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"slices"

	"google.golang.org/protobuf/proto"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// errProtocol is the error of an Update that does not fit what is held, or not
// its own hash.
var errProtocol = errors.New("the control plane broke the protocol")

// holding is what an edge holds at a revision, as received. It is immutable.
type holding struct {
	clusterID string
	revision  int64
	hash      []byte
	resources map[string]*resource // by "Kind/name"
}

// resource is one resource as received and as understood.
type resource struct {
	encoded *resealv1.EncodedResource
	decoded *resealv1.Resource
	problem string // why decoded can't be used, or ""
}

// with returns what h, which may be nil, becomes by update. Its error is
// errProtocol.
func (h *holding) with(update *resealv1.Update) (*holding, error) {
	next := &holding{clusterID: update.GetClusterId(), revision: update.GetRevision(), hash: update.GetHash()}
	switch base := update.GetBaseRevision(); {
	case update.GetRevision() <= 0:
		return nil, fmt.Errorf("%w: update to revision %d", errProtocol, update.GetRevision())
	case base == 0:
		next.resources = make(map[string]*resource, len(update.GetUpserts()))
	case h == nil:
		return nil, fmt.Errorf("%w: update on revision %d, nothing is held", errProtocol, base)
	case base != h.revision || update.GetClusterId() != h.clusterID:
		return nil, fmt.Errorf("%w: update on revision %d of cluster %q, held is revision %d of cluster %q",
			errProtocol, base, update.GetClusterId(), h.revision, h.clusterID)
	case len(update.GetUpserts())+len(update.GetDeletes()) == 0:
		next.resources = h.resources
	default:
		next.resources = maps.Clone(h.resources)
	}
	for _, ref := range update.GetDeletes() {
		delete(next.resources, ref.Key())
	}
	for _, encoded := range update.GetUpserts() {
		next.resources[encoded.GetKind()+"/"+encoded.GetName()] = decode(encoded)
	}
	if sum := resealv1.HashEncoded(next.encoded()); !bytes.Equal(sum, next.hash) {
		return nil, fmt.Errorf("%w: revision %d hashes to %x, the update says %x", errProtocol, next.revision, sum, next.hash)
	}
	return next, nil
}

// decode understands a resource. Bytes that this edge can't use are held all the
// same: they are part of what the control plane believes it to hold.
func decode(encoded *resealv1.EncodedResource) *resource {
	r := &resource{encoded: encoded, decoded: &resealv1.Resource{}}
	switch err := proto.Unmarshal(encoded.GetResource(), r.decoded); {
	case err != nil:
		r.problem = "is not a resource: " + err.Error()
	case r.decoded.Kind() == "":
		r.problem = "is of a kind that this version of the edge does not know"
	case r.decoded.Kind() != encoded.GetKind() || r.decoded.GetMetadata().GetName() != encoded.GetName():
		r.problem = "holds another resource, " + r.decoded.Ref().Key()
	}
	return r
}

// problems are the resources that can't be used.
func (h *holding) problems() []*resealv1.Violation {
	var violations []*resealv1.Violation
	for _, key := range slices.Sorted(maps.Keys(h.resources)) {
		if r := h.resources[key]; r.problem != "" {
			violations = append(violations, &resealv1.Violation{
				Resource:    &resealv1.ResourceRef{Kind: r.encoded.GetKind(), Name: r.encoded.GetName()},
				Description: r.problem,
			})
		}
	}
	return violations
}

// snapshot holds the resources that can be used.
func (h *holding) snapshot() *resealv1.Snapshot {
	resources := make([]*resealv1.Resource, 0, len(h.resources))
	for _, r := range h.resources {
		if r.problem == "" {
			resources = append(resources, r.decoded)
		}
	}
	return resealv1.NewSnapshot(h.clusterID, h.revision, resources)
}

// part is what is in force when a part of h is refused: resources that are of h, or
// of before, which may be nil. It has no revision.
func (h *holding) part(inForce []*resealv1.Resource, before *holding) (*holding, error) {
	part := &holding{clusterID: h.clusterID, resources: make(map[string]*resource, len(inForce))}
	for _, served := range inForce {
		key := served.Ref().Key()
		found, err := h.find(key, served, before)
		if err != nil {
			return nil, err
		}
		part.resources[key] = found
	}
	part.hash = resealv1.HashEncoded(part.encoded())
	return part, nil
}

func (h *holding) find(key string, served *resealv1.Resource, before *holding) (*resource, error) {
	if r := h.resources[key]; r != nil && proto.Equal(r.decoded, served) {
		return r, nil
	}
	if before != nil {
		if r := before.resources[key]; r != nil && proto.Equal(r.decoded, served) {
			return r, nil
		}
	}
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(served)
	if err != nil {
		return nil, err
	}
	ref := served.Ref()
	return &resource{encoded: &resealv1.EncodedResource{Kind: ref.Kind, Name: ref.Name, Resource: data}, decoded: served}, nil
}

func (h *holding) encoded() []*resealv1.EncodedResource {
	encoded := make([]*resealv1.EncodedResource, 0, len(h.resources))
	for _, r := range h.resources {
		encoded = append(encoded, r.encoded)
	}
	return encoded
}
