package store

import (
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// reservedPrefix starts every stored secret, of any version. No secret
	// that a client sends may.
	reservedPrefix = "sealed:"
	// sealedPrefix is followed by the sealed bytes in base64.
	sealedPrefix = reservedPrefix + "v1:"
)

// secretFields names the message types that hold a write-only field at any
// depth, so that the others need no look.
type secretFields map[protoreflect.FullName]bool

// findSecrets looks through a message type and all that it is made of.
func findSecrets(desc protoreflect.MessageDescriptor) secretFields {
	found := secretFields{}
	// A type that is being visited counts as none: what a recursive type holds
	// is found outside of the recursion. The second pass tells the inner ones.
	for range 2 {
		found.find(desc, map[protoreflect.FullName]bool{})
	}
	return found
}

func (f secretFields) find(desc protoreflect.MessageDescriptor, seen map[protoreflect.FullName]bool) bool {
	if seen[desc.FullName()] {
		return f[desc.FullName()]
	}
	seen[desc.FullName()] = true
	fields := desc.Fields()
	for i := range fields.Len() {
		field := fields.Get(i)
		if isSecret(field) || field.Message() != nil && f.find(field.Message(), seen) {
			f[desc.FullName()] = true
		}
	}
	return f[desc.FullName()]
}

func isSecret(field protoreflect.FieldDescriptor) bool {
	secret, _ := proto.GetExtension(field.Options(), resealv1.E_Secret).(bool)
	return secret
}

// has tells whether r may hold secrets.
func (f secretFields) has(r *resealv1.Resource) bool {
	spec := r.SpecMessage()
	return spec != nil && f[spec.Descriptor().FullName()]
}

// edit calls fn for every secret of r that is set, with its path as in
// violations, and replaces it in r by what fn returns. A secret is a string.
func (f secretFields) edit(r *resealv1.Resource, fn func(path, value string) (string, error)) error {
	if !f.has(r) {
		return nil
	}
	return f.editMessage("spec", r.SpecMessage(), fn)
}

func (f secretFields) editMessage(path string, m protoreflect.Message, fn func(path, value string) (string, error)) error {
	if !f[m.Descriptor().FullName()] {
		return nil
	}
	var failed error
	m.Range(func(field protoreflect.FieldDescriptor, value protoreflect.Value) bool {
		at := path + "." + field.JSONName()
		switch {
		case isSecret(field):
			failed = editString(at, m, field, value, fn)
		case field.IsMap():
			if field.MapValue().Message() != nil {
				value.Map().Range(func(key protoreflect.MapKey, item protoreflect.Value) bool {
					failed = f.editMessage(fmt.Sprintf("%s[%q]", at, key.String()), item.Message(), fn)
					return failed == nil
				})
			}
		case field.Message() == nil:
		case field.IsList():
			for i := range value.List().Len() {
				if failed == nil {
					failed = f.editMessage(fmt.Sprintf("%s[%d]", at, i), value.List().Get(i).Message(), fn)
				}
			}
		default:
			failed = f.editMessage(at, value.Message(), fn)
		}
		return failed == nil
	})
	return failed
}

func editString(path string, m protoreflect.Message, field protoreflect.FieldDescriptor, value protoreflect.Value, fn func(path, value string) (string, error)) error {
	old := value.String()
	edited, err := fn(path, old)
	if err == nil && edited != old {
		m.Set(field, protoreflect.ValueOfString(edited))
	}
	return err
}

// values are the secrets of r by path, as they stand in r.
func (f secretFields) values(r *resealv1.Resource) map[string]string {
	found := map[string]string{}
	// Nothing is edited and nothing can fail.
	_ = f.edit(r, func(path, value string) (string, error) {
		found[path] = value
		return value, nil
	})
	return found
}

// changed are the paths of the secrets that after has and before has not, or
// has with another value. Equal secrets are stored as equal text.
func (f secretFields) changed(before, after *resealv1.Resource) []string {
	if after == nil {
		return nil
	}
	old := f.values(before)
	paths := []string{}
	for path, value := range f.values(after) {
		if old[path] != value {
			paths = append(paths, path)
		}
		delete(old, path)
	}
	// What is left was taken away.
	paths = slices.AppendSeq(paths, maps.Keys(old))
	slices.Sort(paths)
	return paths
}

// Redact returns r with resealv1.SecretMarker in place of its secrets. It is r
// itself when there are none, so the result must not be changed.
func (s *Store) Redact(r *resealv1.Resource) *resealv1.Resource {
	if r == nil || !s.secrets.has(r) {
		return r
	}
	r = proto.CloneOf(r)
	_ = s.secrets.edit(r, func(string, string) (string, error) { return resealv1.SecretMarker, nil })
	return r
}

// Unseal returns a copy of r with its secrets in clear, for the edges that use
// them.
func (s *Store) Unseal(r *resealv1.Resource) (*resealv1.Resource, error) {
	r = proto.CloneOf(r)
	err := s.secrets.edit(r, func(path, value string) (string, error) { return s.open(r.Ref(), path, value) })
	if err != nil {
		return nil, err
	}
	return r, nil
}

// sealContext binds a sealed value to its place.
func sealContext(ref *resealv1.ResourceRef, path string) []byte {
	return []byte(ref.Key() + "/" + path)
}

func (s *Store) seal(ref *resealv1.ResourceRef, path, plaintext string) (string, error) {
	if s.cfg.Seal == nil {
		return "", fmt.Errorf("seal %s: %s: no key to seal with", ref.Key(), path)
	}
	sealed, err := s.cfg.Seal([]byte(plaintext), sealContext(ref, path))
	if err != nil {
		return "", fmt.Errorf("seal %s: %s: %w", ref.Key(), path, err)
	}
	return sealedPrefix + base64.StdEncoding.EncodeToString(sealed), nil
}

func (s *Store) open(ref *resealv1.ResourceRef, path, stored string) (string, error) {
	encoded, ok := strings.CutPrefix(stored, sealedPrefix)
	if !ok {
		return "", fmt.Errorf("open %s: %s: it is not sealed", ref.Key(), path)
	}
	sealed, err := base64.StdEncoding.DecodeString(encoded)
	if err == nil && s.cfg.Open == nil {
		err = errors.New("no key to open it with")
	}
	var plaintext []byte
	if err == nil {
		plaintext, err = s.cfg.Open(sealed, sealContext(ref, path))
	}
	if err != nil {
		return "", fmt.Errorf("open %s: %s: %w", ref.Key(), path, err)
	}
	return string(plaintext), nil
}

// checkSecrets finds secrets that a client can't have meant.
func (s *Store) checkSecrets(r *resealv1.Resource) []*resealv1.Violation {
	var violations []*resealv1.Violation
	for path, value := range s.secrets.values(r) {
		description := ""
		switch {
		case strings.TrimSpace(value) == resealv1.SecretMarker:
			description = fmt.Sprintf("%s stands for a secret that is not shown; leave the field out to keep the stored value", resealv1.SecretMarker)
		case strings.HasPrefix(strings.TrimSpace(value), reservedPrefix):
			description = fmt.Sprintf("a value that starts with %q is how the store keeps secrets; give the secret itself", reservedPrefix)
		default:
			continue
		}
		violations = append(violations, &resealv1.Violation{Resource: r.Ref(), Field: path, Description: description})
	}
	return violations
}

// carryKey gives a Certificate without a private key the stored one, if that
// still belongs to it.
func carryKey(r, stored *resealv1.Resource) *resealv1.Violation {
	certificate, old := r.GetCertificate(), stored.GetCertificate()
	if certificate.GetCertificatePem() == "" || certificate.GetPrivateKeyPem() != "" || certificate.GetCertificateFile() != "" {
		return nil
	}
	description := ""
	switch {
	case old.GetPrivateKeyPem() == "":
		description = "certificatePem needs its private key, and none is stored yet"
	case old.GetCertificatePem() != certificate.GetCertificatePem():
		description = "certificatePem changed, so its private key must be given again"
	default:
		certificate.PrivateKeyPem = old.GetPrivateKeyPem()
		return nil
	}
	return &resealv1.Violation{Resource: r.Ref(), Field: "spec.privateKeyPem", Description: description}
}

// sealAll seals the secrets of r that are in clear. A secret equal to the one in
// stored gets its sealed text, so that it compares as unchanged.
func (s *Store) sealAll(r, stored *resealv1.Resource) error {
	old := s.secrets.values(stored)
	return s.secrets.edit(r, func(path, value string) (string, error) {
		before, had := old[path]
		if had && before == value {
			return value, nil // carried over
		}
		plaintext, sealed := value, strings.HasPrefix(value, sealedPrefix)
		if sealed { // it comes from the history
			var err error
			if plaintext, err = s.open(r.Ref(), path, value); err != nil {
				s.log.Warn("a secret from the history can't be opened", "error", err)
				return value, nil //nolint:nilerr // it comes back as it was
			}
		}
		if had {
			known, err := s.open(r.Ref(), path, before)
			if err == nil && known == plaintext {
				return before, nil
			}
			if err != nil {
				s.log.Warn("a stored secret can't be opened; it is replaced", "error", err)
			}
		}
		if sealed {
			return value, nil
		}
		return s.seal(r.Ref(), path, plaintext)
	})
}
