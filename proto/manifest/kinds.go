package manifest

import (
	"strings"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// APIVersion is the apiVersion of every manifest.
const APIVersion = "reseal/v1"

// listKind is the kind of a document that only holds others.
const listKind = "List"

// KindByName resolves what people write for a kind: its name, plural or a short
// form, in any case. For example "pools", "bp" and "BackendPool" are all
// "BackendPool".
func KindByName(name string) (kind string, ok bool) {
	name = strings.ToLower(name)
	for _, kind := range resealv1.Kinds {
		if name == strings.ToLower(kind) || name == plural(kind) {
			return kind, true
		}
	}
	switch name {
	case "pool", "pools", "bp":
		return "BackendPool", true
	case "policy", "policies":
		return "TLSPolicy", true
	case "cert", "certs":
		return "Certificate", true
	}
	return "", false
}

// plural is a kind as commands write it, for example "tlspolicies".
func plural(kind string) string {
	name := strings.ToLower(kind)
	if stem, ok := strings.CutSuffix(name, "y"); ok {
		return stem + "ies"
	}
	return name + "s"
}
