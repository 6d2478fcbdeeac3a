package frontend

import (
	"net/http"
	"net/netip"
	"strconv"
	"strings"

	"github.com/reseal/reseal/edge/exchange"
)

// setForwarded tells the backend about the client, in Forwarded (RFC 7239) and
// in the X-Forwarded-* that are in use beside it. What a trusted client says of
// the hops before it is kept and extended, what another says is dropped.
func setForwarded(header http.Header, source netip.AddrPort, host string, port uint16, trusted bool) {
	dropClaims(header, trusted)
	client := source.Addr().Unmap().WithZone("").String()
	appendList(header, "X-Forwarded-For", client)
	appendList(header, "Forwarded", forwardedElement(source.Addr(), host))
	setAbsent(header, "X-Forwarded-Proto", "https")
	setAbsent(header, "X-Forwarded-Host", host)
	setAbsent(header, "X-Forwarded-Port", strconv.Itoa(int(port)))
}

// dropClaims removes every field that a backend may take for a statement of a
// proxy about the client, also those that CGI can't tell from one. A trusted
// client keeps all but Client-Cert and Client-Cert-Chain, which only the server
// that made the handshake may set (RFC 9440 section 4).
func dropClaims(header http.Header, trusted bool) {
	for name := range header {
		plain := strings.ToLower(strings.ReplaceAll(name, "_", "-"))
		if plain == "client-cert" || plain == "client-cert-chain" || !trusted && exchange.NamesClient(name) {
			delete(header, name)
		}
	}
}

// appendList adds to a comma-separated list, on one line.
func appendList(header http.Header, name, element string) {
	if before := header[name]; len(before) > 0 {
		element = strings.Join(before, ", ") + ", " + element
	}
	header[name] = []string{element}
}

func setAbsent(header http.Header, name, value string) {
	if header.Get(name) == "" && value != "" {
		header[name] = []string{value}
	}
}

// forwardedElement is our hop. IPv6 addresses and hosts with a port are no
// tokens and need quotes (RFC 7239 section 4).
func forwardedElement(client netip.Addr, host string) string {
	client = client.Unmap().WithZone("")
	node := client.String()
	if client.Is6() {
		node = `"[` + node + `]"`
	}
	element := "for=" + node
	if host != "" {
		element += ";host=" + quoted(host)
	}
	return element + ";proto=https"
}

// quoted quotes what is no token. host was checked: there is nothing to escape.
func quoted(host string) string {
	if strings.ContainsAny(host, ":[]") {
		return `"` + host + `"`
	}
	return host
}
