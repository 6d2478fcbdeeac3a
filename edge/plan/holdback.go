package plan

import (
	"bytes"
	"maps"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Refuse holds back the resources that violations name. Besides Compile itself,
// it is called by whoever finds that a plan can't be put in force, for example
// because an address is in use; Compile then makes another plan. It reports false
// when none of the violations is of a resource that can be held back.
func (d *Draft) Refuse(violations []*resealv1.Violation) bool {
	refused := map[string]bool{}
	for _, violation := range violations {
		key := violation.GetResource().Key()
		if d.chosen[key] == nil || d.changed(key) {
			d.record(violation)
			refused[key] = true
			continue
		}
		// It is in force as it is, so something new beside it is to blame.
		if suspects := d.suspects(key, violation.GetField()); len(suspects) > 0 {
			for _, suspect := range suspects {
				refused[suspect] = true
			}
			continue
		}
		d.record(violation)
		refused[key] = true
	}
	progress := false
	for _, key := range slices.Sorted(maps.Keys(refused)) {
		progress = progress || d.chosen[key] != nil
		d.hold(key)
	}
	return progress
}

func (d *Draft) record(violation *resealv1.Violation) {
	same := func(other *resealv1.Violation) bool { return proto.Equal(other, violation) }
	if !slices.ContainsFunc(d.violations, same) {
		d.violations = append(d.violations, violation)
	}
}

// changed reports whether a resource is chosen in another edition than the one
// that is in force.
func (d *Draft) changed(key string) bool {
	return d.chosen[key] != nil && d.chosen[key] != d.last[key]
}

// suspects are changed resources that may keep one that did not change from being
// served: what it needs, and listeners that want its address.
func (d *Draft) suspects(key, field string) []string {
	found := map[string]bool{}
	var search func(key string)
	search = func(key string) {
		for _, need := range needs(d.chosen[key]) {
			if !found[need] && d.changed(need) {
				found[need] = true
			}
			search(need)
		}
	}
	search(key)
	if strings.HasPrefix(key, "Listener/") && field == "spec.address" {
		for other := range d.chosen {
			if strings.HasPrefix(other, "Listener/") && d.changed(other) {
				found[other] = true
			}
		}
	}
	return slices.Sorted(maps.Keys(found))
}

// hold takes the edition of a resource back to an older one, and with it those
// that refer to the resource.
func (d *Draft) hold(key string) {
	now := d.chosen[key]
	if now == nil {
		return
	}
	rungs := d.ladder(key)
	if next := slices.Index(rungs, now) + 1; next < len(rungs) {
		d.chosen[key] = rungs[next]
		d.restore(key)
	} else {
		delete(d.chosen, key)
		d.gone[key] = true
	}
	d.holdUsers(key)
}

// ladder are the editions of a resource from the one of the snapshot down: that in
// force, if the content of its files was renewed, and that in force as it is.
func (d *Draft) ladder(key string) []*edition {
	if rungs, ok := d.ladders[key]; ok {
		return rungs
	}
	var rungs []*edition
	want, kept := d.wanted[key], d.last[key]
	if want != nil {
		rungs = append(rungs, want)
	}
	if kept != nil && kept != want {
		if d.renewed(kept) && (want == nil || !proto.Equal(want.resource, kept.resource)) {
			rungs = append(rungs, &edition{resource: kept.resource, files: map[string][]byte{}})
		}
		rungs = append(rungs, kept)
	}
	d.ladders[key] = rungs
	return rungs
}

// holdUsers holds back those that refer to a resource that is held back: those that
// changed, since they may rely on what did not come, and when the resource is not
// served at all, those that need it.
func (d *Draft) holdUsers(key string) {
	for _, user := range d.usersOf(key) {
		e := d.chosen[user]
		if d.changed(user) && e == d.wanted[user] && slices.Contains(references(e), key) {
			d.hold(user)
		}
	}
	if d.chosen[key] != nil {
		return
	}
	for _, user := range d.usersOf(key) {
		for slices.Contains(needs(d.chosen[user]), key) {
			d.hold(user)
		}
	}
}

// usersOf are the resources that refer to one in any edition, sorted.
func (d *Draft) usersOf(key string) []string {
	if d.users == nil {
		d.users = map[string][]string{}
		for _, editions := range []map[string]*edition{d.wanted, d.last} {
			for user, e := range editions {
				for _, used := range references(e) {
					d.users[used] = append(d.users[used], user)
				}
			}
		}
		for used, users := range d.users {
			slices.Sort(users)
			d.users[used] = slices.Compact(users)
		}
	}
	return d.users[key]
}

// renewed reports whether a file of an edition in force has new content.
func (d *Draft) renewed(kept *edition) bool {
	for name, data := range kept.files {
		if fresh := d.read(name); fresh.err == nil && !bytes.Equal(fresh.data, data) {
			return true
		}
	}
	return false
}

// restore brings back what an edition that stays in force needs, if the snapshot
// has it no longer.
func (d *Draft) restore(key string) {
	for _, need := range needs(d.chosen[key]) {
		if _, ok := d.wanted[need]; ok || d.chosen[need] != nil || d.last[need] == nil || d.gone[need] {
			continue
		}
		d.chosen[need] = d.last[need]
		d.restore(need)
	}
}

// needs are the keys of the resources without which an edition can't be served.
func needs(e *edition) []string {
	if e == nil || e.resource.SpecMessage() == nil {
		return nil
	}
	var keys []string
	need := func(kind, name string) {
		if name != "" {
			keys = append(keys, kind+"/"+name)
		}
	}
	switch spec := e.resource.SpecMessage().Interface().(type) {
	case *resealv1.Listener:
		for _, name := range spec.GetCertificates() {
			need("Certificate", name)
		}
		need("TLSPolicy", spec.GetTlsPolicy())
		need("BackendPool", spec.GetPool())
	case *resealv1.BackendPool:
		need("TLSPolicy", spec.GetTls().GetPolicy())
		need("Certificate", spec.GetTls().GetClientCertificate())
	case *resealv1.Route:
		for _, pool := range spec.GetPools() {
			need("BackendPool", pool.GetName())
		}
	}
	return keys
}

// references are the keys of all resources that an edition names: those that it
// needs, and a Route's Listeners.
func references(e *edition) []string {
	keys := needs(e)
	if e != nil {
		for _, name := range e.resource.GetRoute().GetListeners() {
			keys = append(keys, "Listener/"+name)
		}
	}
	return keys
}

func refOf(key string) *resealv1.ResourceRef {
	kind, name, _ := strings.Cut(key, "/")
	return &resealv1.ResourceRef{Kind: kind, Name: name}
}
