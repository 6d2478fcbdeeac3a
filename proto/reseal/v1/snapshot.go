package resealv1

import (
	"crypto/sha256"
	"maps"
	"slices"
	"strings"
)

// Snapshot is all configuration at one revision. It is immutable: neither it
// nor the resources in it may be changed.
type Snapshot struct {
	clusterID string
	revision  int64
	resources map[string]*Resource // by "Kind/name"
}

// NewSnapshot makes a snapshot of resources, which it then owns. Of resources
// with the same kind and name the last one counts.
func NewSnapshot(clusterID string, revision int64, resources []*Resource) *Snapshot {
	byKey := make(map[string]*Resource, len(resources))
	for _, resource := range resources {
		byKey[resource.Ref().Key()] = resource
	}
	return &Snapshot{clusterID: clusterID, revision: revision, resources: byKey}
}

// With returns the snapshot that upserts and then deletes lead to.
func (s *Snapshot) With(revision int64, upserts []*Resource, deletes []*ResourceRef) *Snapshot {
	next := &Snapshot{clusterID: s.clusterID, revision: revision, resources: maps.Clone(s.resources)}
	for _, resource := range upserts {
		next.resources[resource.Ref().Key()] = resource
	}
	for _, ref := range deletes {
		delete(next.resources, ref.Key())
	}
	return next
}

// ClusterID names the etcd cluster that numbered the revision.
func (s *Snapshot) ClusterID() string { return s.clusterID }

// Revision is the snapshot's number, 0 for an empty store.
func (s *Snapshot) Revision() int64 { return s.revision }

// Len is the number of resources.
func (s *Snapshot) Len() int { return len(s.resources) }

// Get returns a resource, or nil.
func (s *Snapshot) Get(kind, name string) *Resource { return s.resources[kind+"/"+name] }

// All returns the resources, sorted by kind, then name.
func (s *Snapshot) All() []*Resource {
	return slices.SortedFunc(maps.Values(s.resources), compareResources)
}

// Kind returns the resources of one kind, sorted by name.
func (s *Snapshot) Kind(kind string) []*Resource {
	var found []*Resource
	for _, resource := range s.resources {
		if resource.Kind() == kind {
			found = append(found, resource)
		}
	}
	slices.SortFunc(found, compareResources)
	return found
}

func compareResources(a, b *Resource) int {
	if c := strings.Compare(a.Kind(), b.Kind()); c != 0 {
		return c
	}
	return strings.Compare(a.GetMetadata().GetName(), b.GetMetadata().GetName())
}

// HashEncoded is Update.hash over the resources that an edge holds. It sorts
// held in place.
func HashEncoded(held []*EncodedResource) []byte {
	slices.SortFunc(held, func(a, b *EncodedResource) int {
		if c := strings.Compare(a.Kind, b.Kind); c != 0 {
			return c
		}
		return strings.Compare(a.Name, b.Name)
	})
	digest := sha256.New()
	for _, resource := range held {
		sum := sha256.Sum256(resource.Resource)
		digest.Write([]byte(resource.Kind + "\x00" + resource.Name + "\x00"))
		digest.Write(sum[:])
	}
	return digest.Sum(nil)
}
